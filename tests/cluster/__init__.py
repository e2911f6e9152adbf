"""Tests on a cluster of several hosts, which is made on this machine: docs/testing-on-a-cluster.md."""
