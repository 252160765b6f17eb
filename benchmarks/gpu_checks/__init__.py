"""The checks of `gpu_check.py`: each is a function of a [`Bench`](material.py) that fills [`Figures`](report.py)."""
