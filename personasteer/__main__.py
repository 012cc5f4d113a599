from personasteer.cli import main

main()
