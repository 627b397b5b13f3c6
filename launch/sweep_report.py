def write(spec, folder, results):
    yield str(results.get_dataframe())
