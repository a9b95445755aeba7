"""Signal (AAAI 2026): selective interaction and global-local alignment on a shared backbone."""
