//! Numbers in messages.

/// Returns a count and its noun: `1 class`, `2 classes`.
pub(crate) fn counted(n: usize, noun: &str) -> String {
    let ending = match (n, noun.ends_with('s')) {
        (1, _) => "",
        (_, true) => "es",
        (_, false) => "s",
    };
    format!("{n} {noun}{ending}")
}

#[cfg(test)]
mod tests {
    use super::counted;

    #[test]
    fn nouns_agree_with_their_numbers() {
        assert_eq!([0, 1, 2].map(|n| counted(n, "image")), ["0 images", "1 image", "2 images"]);
        assert_eq!([0, 1, 2].map(|n| counted(n, "class")), ["0 classes", "1 class", "2 classes"]);
    }
}
