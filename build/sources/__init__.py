"""Where published weights come from, under canonical (Hugging Face) names."""
