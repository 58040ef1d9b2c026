"""What every room shares: registration, backends, argument checks."""
