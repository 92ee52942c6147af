"""Private synthetic data after arXiv 2202.05469: a VAE, noise under metric privacy on its codes, a release with a card.

The modules in the order of the data's way: ``vae`` (the network), ``training`` (on public data, on private data or by
DP-SGD), ``metric_privacy`` (clip, noise, rescale), ``accountant`` (what the noise proves), ``generator`` (images in,
synthetic images out), ``release`` (the directory that leaves the site), ``card`` (what it says about itself). The
README in this folder names the attacker, the equations and what is not protected.
"""
