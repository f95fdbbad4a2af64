"""Models from the Hugging Face hub: fetched by a child process, into the models folder or a Hugging Face cache."""
