"""What a plain CPU needs beside the model: loaded only where our CPU platform is SGLang's platform."""
