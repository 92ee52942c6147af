"""The operator pages: read the gateway's store, ask the daemon for changes; hold no key of the gateway."""
