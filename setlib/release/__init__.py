"""What the public releases of Rein and SET did: their names, checkpoints, golden numbers."""
