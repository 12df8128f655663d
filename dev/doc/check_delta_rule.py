#!/usr/bin/env python3
"""Checks the equations of dev/doc/delta_rule.md in float64.

    python3 dev/doc/check_delta_rule.py

o and the final state in chunks against the recurrence token by token; the gradients (B1)-(G5) against central
differences of the recurrence; a sequence in splits against the whole one. Exit code 1 where an error exceeds its
bound. Needs numpy alone; a second.
"""

import sys

import numpy as np

C, CHUNKS, DK, DV, SCALE = 16, 3, 8, 12, 0.4
T = C * CHUNKS
NAMES = ("q", "k", "v", "g", "beta")


def recurrence(q, k, v, g, beta, state):
    out = np.zeros_like(v)
    for t in range(len(g)):
        state = np.exp(g[t]) * state
        state = state + np.outer(k[t], beta[t] * (v[t] - state.T @ k[t]))
        out[t] = SCALE * state.T @ q[t]
    return out, state


def prepare(q, k, g, beta):
    G = np.cumsum(g)
    D = np.tril(np.exp(np.minimum(G[:, None] - G[None, :], 0)))
    L = np.tril(D * (k @ k.T), -1)  # (1)
    N = np.linalg.solve(np.eye(len(g)) + L * beta, L)  # (2): L diag(beta) scales columns
    return G, D, N, SCALE * D * (q @ k.T)  # (3)


def forward(q, k, v, g, beta, S):
    """One chunk: O, the state at its end, E."""
    G, _, N, P = prepare(q, k, g, beta)
    eG, to_end, b = np.exp(G)[:, None], np.exp(G[-1] - G)[:, None], beta[:, None]
    R = v - eG * (k @ S)  # (F1)
    E = R - N @ (b * R)  # (F2)
    out = SCALE * eG * (q @ S) + P @ (b * E)  # (F3)
    return out, np.exp(G[-1]) * S + k.T @ (to_end * b * E), E  # (F4)


def backward(q, k, g, beta, d_o, S, dS, E):
    """One chunk: dq, dk, dv, dg, dbeta and dS at its start, from S at its start, dS at its end."""
    G, D, N, P = prepare(q, k, g, beta)
    eG, to_end, b = np.exp(G)[:, None], np.exp(G[-1] - G)[:, None], beta[:, None]
    Y = P.T @ d_o + to_end * (k @ dS)  # (B1)
    X = Y - N.T @ (b * Y)  # (B2)
    dv = b * X  # (B3)
    dS_start = np.exp(G[-1]) * dS + q.T @ (SCALE * eG * d_o) - k.T @ (b * eG * X)
    dbeta = np.sum(X * E, axis=1)  # (G1)
    dqk = SCALE * D * (d_o @ E.T) * beta  # (G2)
    dkk = np.tril(-b * D * (X @ E.T) * beta, -1)
    q_read, k_read = SCALE * eG * (d_o @ S.T), -b * eG * (X @ S.T)
    write = to_end * b * (E @ dS.T)
    dq = q_read + dqk @ k  # (G3)
    dk = k_read + write + dqk.T @ q + (dkk + dkk.T) @ k  # (G4)
    M = dqk * (q @ k.T) + dkk * (k @ k.T)  # (G5)
    reads, writes = np.sum(q * q_read + k * k_read, axis=1), np.sum(k * write, axis=1)
    dg = np.array([np.exp(G[-1]) * np.sum(S * dS) + reads[t:].sum() + writes[:t].sum() + M[t:, :t].sum()
                   for t in range(len(g))])
    return dq, dk, dv, dg, dbeta, dS_start


def in_chunks(inputs, S):
    outs, states, errors = [], [], []
    for i in range(0, T, C):
        states.append(S)
        out, S, E = forward(*(x[i:i + C] for x in inputs), S)
        outs.append(out), errors.append(E)
    return np.concatenate(outs), S, states, errors


def main() -> None:
    random = np.random.default_rng(1)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    inputs = [unit(random.normal(size=(T, DK))), unit(random.normal(size=(T, DK))), random.normal(size=(T, DV)),
              -2 * random.random(T) ** 4, 2 * random.random(T)]
    S0, d_o, dS_end = random.normal(size=(DK, DV)), random.normal(size=(T, DV)), random.normal(size=(DK, DV))
    failures = 0

    def check(name, got, expected, bound):
        nonlocal failures
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        failures += not error <= bound
        print(f"{name:12} error {error:.1e}, expected at most {bound:.0e}{'' if error <= bound else '  FAILED'}")

    out, S_end = recurrence(*inputs, S0)
    chunked, chunked_end, states, errors = in_chunks(inputs, S0)
    check("o", chunked, out, 1e-13)
    check("S", chunked_end, S_end, 1e-13)

    q, k, v, g, beta = inputs
    gradients, dS = [np.zeros_like(x) for x in inputs], dS_end
    for index in reversed(range(CHUNKS)):
        rows = slice(C * index, C * index + C)
        dq, dk, dv, dg, dbeta, dS = backward(q[rows], k[rows], g[rows], beta[rows], d_o[rows], states[index], dS,
                                             errors[index])
        for total, x in zip(gradients, (dq, dk, dv, dg, dbeta)):
            total[rows] = x

    def loss(arrays, S):
        out, end = recurrence(*arrays, S)
        return np.sum(out * d_o) + np.sum(end * dS_end)

    step = 1e-5
    for which, name in enumerate(NAMES + ("S_0",)):
        x = S0 if name == "S_0" else inputs[which]
        numeric = np.zeros_like(x)
        for i in np.ndindex(x.shape):
            at = x[i]
            x[i] = at + step
            up = loss(inputs, S0)
            x[i] = at - step
            numeric[i] = (up - loss(inputs, S0)) / (2 * step)
            x[i] = at
        check("d" + name, dS if name == "S_0" else gradients[which], numeric, 1e-7)

    # splits: S_end = M S_start + B
    nothing = [q, k, np.zeros_like(v), g, beta]
    B = in_chunks(inputs, np.zeros((DK, DV)))[1]
    M = in_chunks([q, k, np.zeros((T, DK)), g, beta], np.eye(DK))[1]
    check("M S + B", M @ S0 + B, S_end, 1e-13)
    check("M S", M @ S0, in_chunks(nothing, S0)[1], 1e-13)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
