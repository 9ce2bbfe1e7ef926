from engine.loading import until_module_loaded

until_module_loaded()
