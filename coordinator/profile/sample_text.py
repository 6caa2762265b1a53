"""A few paragraphs of English, code and numbers: what selectors are calibrated on by default."""

__all__ = ["SAMPLE_TEXT"]

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
