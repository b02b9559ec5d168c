"""Cloud integration: DNS registration, autoscaling lifecycle hooks, and CloudWatch metrics."""
