"""From prompts to text: input processing, the step loop, output processing."""
