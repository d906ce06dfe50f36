"""One task's network: its gates become constants, and channels that are constant or unused go.

Built on graph and instructed; used by `BUTD.select`.
"""
