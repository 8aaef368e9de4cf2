//! Folding of batch normalization into the filter (method section 1).

/// Returns `γ / √(V + ε)`, the factor by which folding multiplies a filter's weights.
///
/// If the running variance `V` is close to zero, the factor is huge. This is what widens the range
/// of a folded layer.
pub fn fold_scale(gamma: f32, variance: f32, epsilon: f32) -> f32 {
    gamma / (variance + epsilon).sqrt()
}

/// Returns `β − μ·scale`, the bias of the folded filter, with `scale` from [`fold_scale`].
pub fn fold_shift(beta: f32, mean: f32, scale: f32) -> f32 {
    beta - mean * scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folded_affine_map_is_batch_norm() {
        let (gamma, beta, mean, variance, epsilon) = (1.5, -0.25, 0.75, 3.99, 0.01);
        let scale = fold_scale(gamma, variance, epsilon);
        // √4 = 2: the scale is 0.75, the shift −0.25 − 0.75 · 0.75.
        assert!((scale - 0.75).abs() < 1e-6);
        assert!((fold_shift(beta, mean, scale) - (-0.8125)).abs() < 1e-6);
    }
}
