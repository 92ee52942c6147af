"""``edgepriv audit``: one sub-command for each thing that can leak."""

from __future__ import annotations

import click

from edgepriv.cli import LazyGroup

AUDITS = {
    "outputs": ("edgepriv.cli.audit_outputs:outputs", "What a model's released outputs give away."),
    "update": ("edgepriv.cli.audit_update:update", "What one federated update gives away."),
    "model": ("edgepriv.cli.audit_model:model", "What the final global model gives away: classes, members."),
    "privacy-tradeoff": ("edgepriv.cli.audit_tradeoff:tradeoff", "Leakage against accuracy, as a picture."),
    "membership": ("edgepriv.cli.audit_membership:membership", "Who was in the training set."),
}


@click.group(cls=LazyGroup, table=AUDITS)
def audit() -> None:
    """Measure what a model, an update or a release gives away."""
