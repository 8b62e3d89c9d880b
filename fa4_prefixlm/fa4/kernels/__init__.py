"""Running a build: tiles, mask_mods, workarounds, launches, and the native backend's kernel."""
