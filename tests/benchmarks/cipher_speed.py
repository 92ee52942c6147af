#!/usr/bin/env python3
"""The cipher's speed against its targets: `edgepriv cipher bench`, judged.

    python tests/benchmarks/cipher_speed.py [--json]

Targets at 1080p RGB, profile flep3: seal and open at most 3.0 times the fastest AEAD alone in the same run, 4.0 times
with the gateway's MAC; at most two frames of extra memory; 1,000 MB/s where the AEAD alone reaches 4,000.
"""

import argparse
import json
import sys

from edgepriv.cipher import bench


def judge(frame):
    """Names of the targets with whether they are met."""
    aead_mb_s = frame["bytes"] / frame["aead_ms"] / 1e3
    fast = min(frame["seal_mb_s"], frame["open_mb_s"]) >= 1000
    return {
        "seal <= 3.0": frame["seal_ratio"] <= 3.0,
        "open <= 3.0": frame["open_ratio"] <= 3.0,
        "seal with MAC <= 4.0": frame["seal_mac_ratio"] <= 4.0,
        "extra memory <= 2 frames": frame["peak_extra_bytes"] <= 2 * frame["bytes"],
        "1,000 MB/s": fast or aead_mb_s < 4000,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    document = bench.run(["VGA", "1080p", "4K"])
    frame = next(row for row in document["frames"] if row["name"] == "1080p")
    document["targets"] = judge(frame)
    if as_json:
        print(json.dumps(document))
    else:
        for row in document["frames"]:
            print(
                f"{row['name']:6} AEAD {row['aead_ms']:.3f} ms, seal {row['seal_ratio']:.2f}x, "
                f"with MAC {row['seal_mac_ratio']:.2f}x, open {row['open_ratio']:.2f}x, "
                f"{row['seal_mb_s']:.0f} MB/s, extra {row['peak_extra_frames']:.2f} frames"
            )
        for name, met in document["targets"].items():
            print(f"{'met   ' if met else 'MISSED'} {name}")
    return 0 if all(document["targets"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
