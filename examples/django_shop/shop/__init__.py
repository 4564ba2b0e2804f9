"""An app that counts its page views."""
