fn main() -> std::process::ExitCode {
    waltrail::cli::main()
}
