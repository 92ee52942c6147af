"""Audit an ONNX classifier before you deploy it. Run: python audit_model.py MODEL.onnx DATA (needs edgepriv[server])"""

import sys
from pathlib import Path

from edgepriv import audit_outputs, parse_policy
from edgepriv.cli.audit_outputs import open_pictures
from edgepriv.risk.reconstruction.audit import AuditRequest
from edgepriv.risk.reconstruction.leakage import AuditSettings
from edgepriv.risk.reconstruction.supplied_model import SuppliedModel

if len(sys.argv) != 3:
    sys.exit(__doc__)
probe, references = open_pictures(sys.argv[2])
policies = [parse_policy("argmax"), parse_policy("unsafe_raw_logits")]
quick = AuditRequest(AuditSettings(trained=None), references=2)  # closed-form auditors; leave it out for the full audit
audit = audit_outputs(SuppliedModel.find(Path(sys.argv[1])), probe, policies, quick, reference_data=references)
print(audit.verdict.word, "-", audit.verdict.reason)
for row in audit.policies:
    print(f"{row.policy}: {row.bits:.1f} bits, explained variance {row.score.explained_variance:.3f}")
