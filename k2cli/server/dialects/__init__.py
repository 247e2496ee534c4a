"""The forms of requests and answers that clients know; each module only translates."""
