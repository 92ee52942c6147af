"""Part of edgepriv; see the README in this folder or in edgepriv/README.md."""
