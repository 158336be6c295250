"""From a JSON body to a `GenerationRequest`."""
