"""The commands of `kvmmap library`, by what they do: `looking`, `keeping`, and what they share."""
