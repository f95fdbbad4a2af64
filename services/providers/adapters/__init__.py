"""Providers of text, pictures and judgements: OpenAI's API, local models, the local image and vision servers."""
