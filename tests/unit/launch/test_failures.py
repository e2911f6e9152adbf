import pytest
import torch.distributed as dist

from launch.failures import is_lost_peer


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:28822."),
        RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 6000ms for send operation to complete"),
        dist.DistNetworkError("recvValue failed: Failed to recv, got 0 bytes. Connection was likely closed."),
        dist.DistStoreError("Timed out after 6 seconds waiting for clients. 1/2 clients joined."),
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network error"),
        RuntimeError("Gloo connectFullMesh failed with [gloo/pair.cc:144] no error: Connection refused"),
    ],
)
def test_what_collectives_say_of_a_lost_rank(error):
    assert is_lost_peer(error)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("Connection reset by peer"),  # of a download
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x2 and 3x4)"),
        RuntimeError("[gloo/allreduce.cc:1] invalid argument: tensors must be dense"),
        KeyError("Timed out waiting 5ms"),
    ],
)
def test_other_errors_are_their_own(error):
    assert not is_lost_peer(error)
