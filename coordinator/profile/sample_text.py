"""A few paragraphs of English, code and numbers: what selectors are calibrated on by default, and then judged by."""

__all__ = ["HELD_OUT_TEXT", "SAMPLE_TEXT"]

SAMPLE_TEXT = """\
The lighthouse stood at the end of a long spit of gravel, and for eleven months of the year nobody came to it except the
keeper's sister, who rowed across on Sundays with bread, newspapers and whatever gossip the harbour had produced. In
December the swell was too high for a small boat. He wrote her letters then, numbered, and handed them over in March.

Photosynthesis turns light, water and carbon dioxide into sugar and oxygen. The light is caught by chlorophyll in the
membranes of the chloroplast; its energy splits water and drives electrons along a chain of proteins. What is stored on
the way, as ATP and NADPH, pays for fixing the carbon in the Calvin cycle, which needs no light by itself.

def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2

Question: A train leaves at 14:35 and arrives at 17:10. It travels 279 kilometres. What is its average speed?
Answer: The journey takes 2 hours and 35 minutes, which is 2.583 hours. 279 / 2.583 = 108, so about 108 km/h.

"You said the roof would last another winter," she said. "I said it might," he answered, and put the bucket under the
drip. Outside the rain had turned to sleet. They laughed, because there was nothing else to do, and because the soup
was hot and the cat had already found the only dry chair.

The committee met on 4 May 1987 to discuss the budget. Expenses had risen by 12 percent, mainly for heating; income from
rents had not. It was agreed to sell the smaller of the two warehouses, provided that it fetched $310,000, and to
postpone the new windows. The chair thanked all members; the next meeting will be held in September.

To make the dough, mix 500 g of flour with 7 g of dry yeast, a spoon of salt and 320 ml of lukewarm water. Knead it for
ten minutes until it is smooth, cover it and let it rise for an hour. Shape two loaves, let them rest for another twenty
minutes, then bake them at 230 degrees until the crust is dark and the bottom sounds hollow.
"""

HELD_OUT_TEXT = """\
The bridge was closed for repairs in the spring of 1994, and the town found out how much it had depended on it. Children
who lived on the far bank took the ferry to school; the baker sold half as much bread. When it opened again after eleven
weeks, somebody had painted a line of small blue fish along the railing, and nobody ever removed them.

class Queue:
    def __init__(self, items=()):
        self.items = list(items)

    def push(self, item):
        self.items.append(item)

Question: How many litres does a tank of 2 m by 1.5 m by 0.8 m hold?
Answer: Its volume is 2.4 cubic metres, so it holds 2,400 litres.
"""
