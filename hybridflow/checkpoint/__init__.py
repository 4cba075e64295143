"""What a resumable run consists of (store.py), how a role writes its share (sharded.py), and the way out (export.py)."""
