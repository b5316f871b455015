"""Many runs: ablations, fine-tuning, searches."""
