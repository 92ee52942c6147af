"""The command tree ``edgepriv``: one table of names, each command in a module of its own, loaded when called.

Rules: results on stdout, progress and logs on stderr; ``--json`` prints one document with a ``schema`` key;
every heavy import stands inside its command, so that ``edgepriv --help`` loads neither numpy nor torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

import click

from edgepriv.errors import EdgeprivError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# command -> (module:attribute, one line for --help). Names with a space are sub-commands of a group.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("edgepriv.cli.demo:demo", "Run the whole product on this machine and write a report."),
    "owner": ("edgepriv.cli.owner:owner", "The offline root: sign who may take part."),
    "keys": ("edgepriv.cli.keys:keys", "Make and show key files."),
    "enroll": ("edgepriv.cli.enroll:enroll", "Enrol this device at a gateway with a one-time token."),
    "renew": ("edgepriv.cli.renew:renew", "Renew this device's certificate before it runs out."),
    "seal": ("edgepriv.cli.seal:seal", "Seal an image for its recipients."),
    "open": ("edgepriv.cli.seal:open_", "Open a sealed image with a recipient's key."),
    "cipher": ("edgepriv.cli.cipher:cipher", "Measure the image cipher: report and bench."),
    "device": ("edgepriv.cli.device:device", "The runtime on the device: run, label, bench."),
    "doctor": ("edgepriv.cli.doctor:doctor", "Check this device and say how to mend what is wrong."),
    "frames": ("edgepriv.cli.frames:frames", "List, fetch and open sealed frames as a recipient."),
    "federated": ("edgepriv.cli.federated:federated", "Device-side tools for federated rounds."),
    "audit": ("edgepriv.cli.audit:audit", "Measure what a model, an update or a release gives away."),
    "harden": ("edgepriv.cli.harden:harden", "Defences against leaking outputs, made and compared for one model."),
    "redteam": ("edgepriv.cli.redteam:redteam", "Train leaking models to test the audits with."),
    "risk": ("edgepriv.cli.risk:risk", "The risk service."),
    "protect": ("edgepriv.cli.protect:protect", "Encrypt a few per cent of a model, with service levels."),
    "grant": ("edgepriv.cli.grant:grant", "Permit a device to open a model up to a level."),
    "restore": ("edgepriv.cli.restore:restore", "Open a protected model with a permission."),
    "model": ("edgepriv.cli.model:model", "Fetch, verify and switch models on this device."),
    "synthesize": ("edgepriv.cli.synthesize:synthesize", "Make synthetic data with a release card."),
}

HELP_LIMIT = 300  # characters of a one-liner: more than any has


class LazyGroup(click.Group):
    """A click group whose commands are imported when they are called, not when the tree is shown."""

    def __init__(self, *args: object, table: Mapping[str, tuple[str, str]] | None = None, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.table = dict(table or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table, then those added by decorators."""
        return [*self.table, *(name for name in super().list_commands(ctx) if name not in self.table)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module and return its click object."""
        if cmd_name not in self.table:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self.table[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show the table's own one-liners, so that help imports nothing, and no line cut off."""
        rows = [(name, text) for name, (_, text) in self.table.items()]
        for name in super().list_commands(ctx):
            command = super().get_command(ctx, name)
            rows.append((name, command.get_short_help_str(HELP_LIMIT) if command else ""))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
    context_settings={"auto_envvar_prefix": "EDGEPRIV", "help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="edgepriv")
def root() -> None:
    """Private AI on edge devices: sealed images, bounded outputs, private rounds, audited models."""


def run(command: click.Command, name: str, argv: Sequence[str] | None = None) -> None:
    """Run a click tree so that every edgepriv error ends as one clear line and its exit code.

    Shared by the three console commands. Unknown exceptions keep their traceback: they are our mistake.
    """
    try:
        code = command.main(args=list(argv) if argv is not None else None, prog_name=name, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except EdgeprivError as error:
        click.echo(f"{name}: {error}", err=True)
        if error.hint:
            click.echo(f"  what to do: {error.hint}", err=True)
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console command ``edgepriv``."""
    run(root, "edgepriv", argv)
