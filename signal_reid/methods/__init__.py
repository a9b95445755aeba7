"""Methods: each is a folder with its model, losses and configurations behind the contract in `base`."""
