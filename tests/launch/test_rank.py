from bitlm_dist.launch.rank import set_gpu_defaults


def test_defaults_for_gpus_do_not_replace_what_the_user_has_set():
    environment = {}
    set_gpu_defaults(environment)
    assert environment == {
        "NCCL_DEBUG": "WARN",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }

    own = {"NCCL_DEBUG": "INFO", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}
    set_gpu_defaults(own)
    assert own["NCCL_DEBUG"] == "INFO"
    assert "PYTORCH_ALLOC_CONF" not in own
