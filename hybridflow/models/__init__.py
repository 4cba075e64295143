"""Language models as training sees them: loading, packed rows, attention over them, output heads, adapters."""
