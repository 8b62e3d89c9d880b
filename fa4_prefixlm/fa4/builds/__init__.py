"""What FA4 builds there are and what each can do, read from their source. Nothing of a build is imported."""
