"""Files and the outside world: images, checkpoints, output folders, the Hub."""
