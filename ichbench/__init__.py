"""ichbench: did this choice really help to segment intracranial hemorrhage on head CT?"""
