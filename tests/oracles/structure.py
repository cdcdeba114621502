"""Structures by plain loops over indices."""

from itertools import product


def _parts(text):
    separator = ":" if ":" in text else "x"
    return tuple(int(part) for part in text.split(separator))


def groups(shape, structure):
    """Return the lists of index tuples that form the groups of a tensor of this shape."""
    found = {}
    for index in product(*(range(side) for side in shape)):
        found.setdefault(_group(index, shape, structure), []).append(index)
    return list(found.values())


def _group(index, shape, structure):
    if structure == "channel":
        return index[0]
    first, second = _parts(structure)
    if ":" in structure:
        return (index[0], index[2:], (*index, 0)[1] // second)  # a vector has one input
    column = 0
    for i, side in zip(index[1:], shape[1:], strict=True):
        column = column * side + i
    return (index[0] // first, column // second)


def follows(mask, structure, support=None):
    """Tell whether a mask (nested tensor of bools) follows a structure."""
    for group in groups(mask.shape, structure):
        kept = [bool(mask[index]) for index in group]
        room = [support is None or bool(support[index]) for index in group]
        if ":" in structure:
            if sum(kept) > _parts(structure)[0]:
                return False
        elif any(kept) and kept != room:
            return False
    return True


def best_under_nm(scores, structure, keep, support=None):
    """Return the largest sum of ``keep`` scores under N:M, by taking the best that still fits."""
    room = {}
    for number, group in enumerate(groups(scores.shape, structure)):
        for index in group:
            room[index] = number
    used = dict.fromkeys(room.values(), 0)
    total, taken = 0.0, 0
    for index in sorted(room, key=lambda i: -float(scores[i])):
        fits = used[room[index]] < _parts(structure)[0]
        if taken < keep and fits and (support is None or support[index]):
            used[room[index]] += 1
            total += float(scores[index])
            taken += 1
    return total


def whole_groups(scores, structure, keep, supports=None):
    """Return the kept (name, index) pairs: groups by mean score until one does not fit."""
    rated = []
    for name, score in scores.items():
        for group in groups(score.shape, structure):
            inside = [i for i in group if supports is None or supports[name][i]]
            if inside:
                mean = sum(float(score[i]) for i in inside) / len(inside)
                rated.append((-mean, len(rated), [(name, i) for i in inside]))
    kept = set()
    for _, _, entries in sorted(rated):
        if len(kept) + len(entries) > keep:
            break
        kept |= set(entries)
    return kept
