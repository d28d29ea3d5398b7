//! Errors as they are told to people. What is wrong is said where it is found.

/// An error with its causes, each told once: many errors tell theirs already.
pub(crate) fn text_of(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_that_was_told_already_is_left_out() {
        let error = anyhow::anyhow!("no room").context("a.q: cannot write: no room").context("one");
        assert_eq!(text_of(&error), "one: a.q: cannot write: no room");
        let error = anyhow::anyhow!("no room").context("cannot write");
        assert_eq!(text_of(&error), "cannot write: no room");
    }
}
