"""Many runs and what they show: ablations (`named`, `ablation`, `tables`), failures of one model (`diagnosis`), gradients."""
