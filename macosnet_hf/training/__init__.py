"""Training: the loop, the data and the objectives behind the scripts in `training/`; needs the extra `train`."""
