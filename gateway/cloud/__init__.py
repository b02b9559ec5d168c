"""What the cloud around a fleet is told and asked: DNS registration, and the signals of autoscaling."""
