//! How long tests run: the environment variable `SENDENSE_TEST_ROUNDS` makes a soak of those that draw what they do.

/// How many rounds a test runs: `SENDENSE_TEST_ROUNDS` times as many as usual.
pub(crate) fn rounds(usual: u32) -> u32 {
    let factor = std::env::var("SENDENSE_TEST_ROUNDS").ok().and_then(|text| text.parse().ok());
    usual * factor.unwrap_or(1)
}
