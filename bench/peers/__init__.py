"""Other software beside the product."""
