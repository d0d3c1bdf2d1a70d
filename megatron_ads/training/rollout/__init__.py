"""Where the rollouts of a step come from: prompts, engines that follow the weights, journals, rewards, dumps."""
