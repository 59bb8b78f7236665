import tests.support.torchtitan  # noqa: F401  (before the tests here import torchtitan, on ranks too)
