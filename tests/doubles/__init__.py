"""Stand-ins for packages that cannot be installed here, as strict as the originals' signatures.

They live in tests alone: the product imports what it always imports and sees no difference.
"""
