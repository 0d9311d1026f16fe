"""kvmmap."""
