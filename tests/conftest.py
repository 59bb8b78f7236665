pytest_plugins = ["moe_dispatch.pytest_plugin"]
