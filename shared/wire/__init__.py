"""What passes between coordinator and workers: messages, their channel, the board, the hand-off. No arithmetic."""
