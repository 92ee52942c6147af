"""How many bits an inference may give away under each policy. Run: python release_policies.py"""

import numpy as np

from edgepriv import parse_policy

logits = np.array([[4.0, 2.5, 0.1, -1.0, -3.0]], np.float32)
for name in ("argmax", "topk:2", "softmax:1", "softmax:2", "unsafe_raw_logits"):
    policy = parse_policy(name)
    print(f"{name:18} at most {policy.bits(5):6.2f} bits, the receiver learns {policy.apply(logits)[0][:5].round(3)}")
